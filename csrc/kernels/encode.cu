// encode: copies token rows to expert rows. encode_backward: sums each token's rows.
#include "empty_rows.cuh"
#include "gather_sum.cuh"

namespace tutelx::kernels {
namespace {

// One team a token: x[t] comes from memory once for all its rows, where a pass over rows would fetch it K times.
template <class T, int W>
__device__ __forceinline__ void copy_token(const T* __restrict__ x, const int32_t* __restrict__ dest,
                                           T* __restrict__ rows, int64_t t, int K, int64_t R, const Teams& teams) {
  const int64_t D = static_cast<int64_t>(teams.vectors) * W;
  const T* from = x + t * D;
  const int32_t* dest_K = dest + t * K;
  for (int v = team_rank(teams); v < teams.vectors; v += kVectorsAThread * teams.size) {
    // All loads of a round before its first store, so that a thread has several in flight.
    Vector<T, W> held[kVectorsAThread];
#pragma unroll
    for (int i = 0; i < kVectorsAThread; ++i) {
      const int at = v + i * teams.size;
      if (at < teams.vectors) held[i] = load<T, W>(from + static_cast<int64_t>(at) * W);
    }
    for (int k = 0; k < K; ++k) {
      const int32_t row = dest_K[k];
      TUTELX_DEVICE_TRAP_UNLESS(row < R, "encode: dest names a row outside [0, R)");
      if (row < 0) continue;
      T* to = rows + row * D;
#pragma unroll
      for (int i = 0; i < kVectorsAThread; ++i) {
        const int at = v + i * teams.size;
        if (at < teams.vectors) store<T, W>(to + static_cast<int64_t>(at) * W, held[i]);
      }
    }
  }
}

// Every row is written exactly once, the empty ones with zeros: the output needs no zero-fill before.
// 5 blocks a multiprocessor: left to choose, ptxas wants more of them and spills.
template <class T, int W>
__global__ void __launch_bounds__(kTeamBlock, 5)
    encode_kernel(const T* __restrict__ x, const int32_t* __restrict__ dest, const int32_t* __restrict__ source,
                  T* __restrict__ rows, int64_t tokens, int K, int64_t R, Teams teams) {
  const int64_t t = team_row(teams);
  if (t < tokens) copy_token<T, W>(x, dest, rows, t, K, R, teams);
  zero_empty_rows<T, W>(source, rows, R, teams.vectors);
}

}  // namespace

cudaError_t launch_encode(const void* x, const int32_t* dest, const int32_t* source, void* rows, int64_t T, int64_t K,
                          int64_t R, int64_t D, DType dtype, cudaStream_t stream) {
  if (!team_sizes_ok(T, D) || !team_sizes_ok(R, D) || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
  if (R == 0 || D == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using Element = TypeIn<decltype(type)>;
    return with_width<Element>(D, aligned(x) && aligned(rows), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(D / W);
      TUTELX_LAUNCH((encode_kernel<Element, W>), blocks_for_tokens_and_empty_rows(T, R, teams), kTeamBlock, 0, stream)
      (static_cast<const Element*>(x), dest, source, static_cast<Element*>(rows), T, static_cast<int>(K), R, teams);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_encode_backward(const void* drows, const int32_t* dest, void* dx, int64_t T, int64_t K, int64_t R,
                                   int64_t D, DType dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using Element = TypeIn<decltype(type)>;
    return launch_gather_sum<Element, NoWeights>(drows, dest, nullptr, dx, T, K, R, D, stream);
  });
}

}  // namespace tutelx::kernels
