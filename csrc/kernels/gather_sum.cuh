// out[t] = sum over k of weights[t,k] * rows[dest[t,k]], or of the rows alone: decode, and the backward of encode.
// The inverse map turns what would be scattered atomics into a gather: one writer an element, the same bits every run.
#pragma once
#include "row_teams.cuh"

namespace tutelx::kernels {

struct NoWeights {};

template <class Weight, class A>
__device__ __forceinline__ void add_scaled(A& sum, A x, const Weight* weights, int64_t slot) {
  sum += static_cast<A>(widen(weights[slot])) * x;
}
template <class A>
__device__ __forceinline__ void add_scaled(A& sum, A x, const NoWeights*, int64_t) {
  sum += x;
}

// kGroup choices are loaded before the first is added, so that their latencies overlap.
template <class T, class Weight, int W, int kGroup>
__global__ void __launch_bounds__(kTeamBlock)
    gather_sum_kernel(const T* __restrict__ rows, const int32_t* __restrict__ dest, const Weight* __restrict__ weights,
                      T* __restrict__ out, int64_t tokens, int K, Teams teams) {
  const int64_t t = team_row(teams);
  if (t >= tokens) return;
  const int64_t D = static_cast<int64_t>(teams.vectors) * W;
  const int32_t* dest_K = dest + t * K;

  for (int v = team_rank(teams); v < teams.vectors; v += teams.size) {
    const int64_t d = static_cast<int64_t>(v) * W;
    Acc<T> sum[W] = {};
    for (int k0 = 0; k0 < K; k0 += kGroup) {
      Vector<T, W> held[kGroup];
      bool kept[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int32_t row = k0 + i < K ? dest_K[k0 + i] : -1;
        kept[i] = row >= 0;
        if (kept[i]) held[i] = load<T, W>(rows + row * D + d);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (!kept[i]) continue;
#pragma unroll
        for (int w = 0; w < W; ++w) add_scaled(sum[w], widen(held[i].at[w]), weights, t * K + k0 + i);
      }
    }
    Vector<T, W> result;
#pragma unroll
    for (int w = 0; w < W; ++w) result.at[w] = narrow<T>(sum[w]);
    store<T, W>(out + t * D + d, result);
  }
}

template <class T, class Weight>
cudaError_t launch_gather_sum(const void* rows, const int32_t* dest, const void* weights, void* out, int64_t tokens,
                              int64_t K, int64_t D, cudaStream_t stream) {
  if (!team_sizes_ok(tokens, D) || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
  if (tokens == 0 || D == 0) return cudaSuccess;
  return with_width<T>(D, aligned(rows) && aligned(out), [&](auto width) {
    constexpr int W = decltype(width)::value;
    const Teams teams = teams_for(D / W);
    const auto launch = [&](auto group) {
      TUTELX_LAUNCH((gather_sum_kernel<T, Weight, W, decltype(group)::value>), team_blocks(tokens, teams), kTeamBlock,
                    0, stream)
      (static_cast<const T*>(rows), dest, static_cast<const Weight*>(weights), static_cast<T*>(out), tokens,
       static_cast<int>(K), teams);
      return cudaGetLastError();
    };
    return K <= 2 ? launch(Constant<2>()) : launch(Constant<4>());
  });
}

}  // namespace tutelx::kernels
