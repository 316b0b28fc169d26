// decode: the weighted sum of each token's rows. decode_backward: both of its gradients in one pass.
#include "empty_rows.cuh"
#include "gather_sum.cuh"

namespace tutelx::kernels {
namespace {

// The sums of `part` over each team; valid in every thread of the team. All threads of the block take part.
template <class A, int N>
__device__ __forceinline__ void team_sum(A (&part)[N], SharedPtr<A> warp_parts, const Teams& teams) {
#pragma unroll
  for (int i = 0; i < N; ++i) part[i] = warp_sum(part[i], min(teams.size, kWarpSize));
  if (teams.size <= kWarpSize) return;
  const int warp = threadIdx.x / kWarpSize, warps = teams.size / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
    for (int i = 0; i < N; ++i) warp_parts[warp * N + i] = part[i];
  }
  __syncthreads();
  for (int i = 0; i < N; ++i) {
    part[i] = 0;
    for (int w = 0; w < warps; ++w) part[i] += static_cast<A>(warp_parts[((warp & -warps) + w) * N + i]);
  }
  __syncthreads();  // before the next group overwrites warp_parts
}

// One team a token: dy[t] comes from memory once for all K choices, where a pass over rows would fetch it K times.
// The loads and dot products of kGroup choices and kAhead vectors are under way together.
template <class T, class Weight, int W, int kGroup, int kAhead>
__device__ __forceinline__ void token_gradients(const T* __restrict__ dy, const T* __restrict__ rows,
                                                const int32_t* __restrict__ dest, const Weight* __restrict__ weights,
                                                T* __restrict__ drows, Weight* __restrict__ dweights, int64_t tokens,
                                                int K, int64_t R, const Teams& teams, SharedPtr<Acc<T>> warp_parts) {
  using A = Acc<T>;
  const int64_t t = team_row(teams);
  const int64_t D = static_cast<int64_t>(teams.vectors) * W;
  const int rank = team_rank(teams);

  for (int k0 = 0; k0 < K; k0 += kGroup) {
    int32_t row[kGroup];
    A weight[kGroup], dot[kGroup] = {};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool exists = t < tokens && k0 + i < K;
      row[i] = exists ? dest[t * K + k0 + i] : -1;
      TUTELX_DEVICE_TRAP_UNLESS(row[i] < R, "decode_backward: dest names a row outside [0, R)");
      weight[i] = row[i] >= 0 ? static_cast<A>(widen(weights[t * K + k0 + i])) : A(0);
    }
    for (int v = rank; t < tokens && v < teams.vectors; v += kAhead * teams.size) {
      Vector<T, W> dy_v[kAhead], held[kAhead][kGroup];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int at = v + a * teams.size;
        if (at >= teams.vectors) continue;
        const int64_t d = static_cast<int64_t>(at) * W;
        dy_v[a] = load<T, W>(dy + t * D + d);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (row[i] >= 0) held[a][i] = load<T, W>(rows + row[i] * D + d);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int at = v + a * teams.size;
        if (at >= teams.vectors) continue;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (row[i] < 0) continue;
          Vector<T, W> out;
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const A g = widen(dy_v[a].at[w]);
            dot[i] += g * widen(held[a][i].at[w]);
            out.at[w] = narrow<T>(weight[i] * g);
          }
          store<T, W>(drows + row[i] * D + static_cast<int64_t>(at) * W, out);
        }
      }
    }
    team_sum(dot, warp_parts, teams);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // Dropped choices have an empty dot product: their zero is written here too.
      if (rank == 0 && t < tokens && k0 + i < K)
        dweights[t * K + k0 + i] = narrow<Weight>(static_cast<Acc<Weight>>(dot[i]));
    }
  }
}

template <class T, class Weight, int W, int kGroup, int kAhead>
__global__ void __launch_bounds__(kTeamBlock)
    decode_backward_kernel(const T* __restrict__ dy, const T* __restrict__ rows, const int32_t* __restrict__ dest,
                           const int32_t* __restrict__ source, const Weight* __restrict__ weights,
                           T* __restrict__ drows, Weight* __restrict__ dweights, int64_t tokens, int K, int64_t R,
                           Teams teams) {
  TUTELX_SHARED(Acc<T>, warp_parts, kTeamWarps * kGroup);
  token_gradients<T, Weight, W, kGroup, kAhead>(dy, rows, dest, weights, drows, dweights, tokens, K, R, teams,
                                                warp_parts);
  zero_empty_rows<T, W>(source, drows, R, teams.vectors);
}

// Calls launch(Type<T>, Type<Weight>).
template <class Launch>
cudaError_t with_types(DType dtype, DType weights_dtype, const Launch& launch) {
  return with_type(dtype, [&](auto type) {
    if (weights_dtype == dtype) return launch(type, type);
    if (weights_dtype == DType::f32) return launch(type, Type<float>());
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t launch_decode(const void* rows, const int32_t* dest, const void* weights, void* y, int64_t T, int64_t K,
                          int64_t R, int64_t D, DType dtype, DType weights_dtype, cudaStream_t stream) {
  return with_types(dtype, weights_dtype, [&](auto type, auto weight) {
    return launch_gather_sum<TypeIn<decltype(type)>, TypeIn<decltype(weight)>>(rows, dest, weights, y, T, K, R, D,
                                                                               stream);
  });
}

cudaError_t launch_decode_backward(const void* dy, const void* rows, const int32_t* dest, const int32_t* source,
                                   const void* weights, void* drows, void* dweights, int64_t T, int64_t K, int64_t R,
                                   int64_t D, DType dtype, DType weights_dtype, cudaStream_t stream) {
  if (!team_sizes_ok(T, D) || !team_sizes_ok(R, D) || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
  if (T * K + R == 0) return cudaSuccess;
  return with_types(dtype, weights_dtype, [&](auto type, auto weight) {
    using Element = TypeIn<decltype(type)>;
    using Weight = TypeIn<decltype(weight)>;
    return with_width<Element>(D, aligned(dy) && aligned(rows) && aligned(drows), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(D / W);
      const auto launch = [&](auto group, auto ahead) {
        TUTELX_LAUNCH((decode_backward_kernel<Element, Weight, W, decltype(group)::value, decltype(ahead)::value>),
                      blocks_for_tokens_and_empty_rows(T, R, teams), kTeamBlock, 0, stream)
        (static_cast<const Element*>(dy), static_cast<const Element*>(rows), dest, source,
         static_cast<const Weight*>(weights), static_cast<Element*>(drows), static_cast<Weight*>(dweights), T,
         static_cast<int>(K), R, teams);
        return cudaGetLastError();
      };
      if constexpr (sizeof(Element) == sizeof(double)) {
        return launch(Constant<1>(), Constant<1>());
      } else {
        return K <= 2 ? launch(Constant<2>(), Constant<2>()) : launch(Constant<4>(), Constant<1>());
      }
    });
  });
}

}  // namespace tutelx::kernels
