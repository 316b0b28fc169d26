// out[t] = sum over k of weights[t,k] * rows[dest[t,k]], or of the rows alone: decode, and the backward of encode.
// The inverse map turns what would be scattered atomics into a gather: one writer an element, the same bits every run.
#pragma once
#include "row_teams.cuh"

namespace tutelx::kernels {

struct NoWeights {};

template <class A, class Weight>
__device__ __forceinline__ A weight_at(const Weight* weights, int64_t slot) {
  return static_cast<A>(widen(weights[slot]));
}
template <class A>
__device__ __forceinline__ A weight_at(const NoWeights*, int64_t) {
  return A(1);
}

// kGroup choices of kAhead vectors are loaded before the first is added, so that their latencies overlap.
template <class T, class Weight, int W, int kGroup, int kAhead>
__global__ void __launch_bounds__(kTeamBlock)
    gather_sum_kernel(const T* __restrict__ rows, const int32_t* __restrict__ dest, const Weight* __restrict__ weights,
                      T* __restrict__ out, int64_t tokens, int K, int64_t R, Teams teams) {
  using A = Acc<T>;
  const int64_t t = team_row(teams);
  if (t >= tokens) return;
  const int64_t D = static_cast<int64_t>(teams.vectors) * W;
  const int32_t* dest_K = dest + t * K;
  const int groups_end = kAhead > 1 ? kGroup : K;  // looking ahead is for a K of one group

  for (int v = team_rank(teams); v < teams.vectors; v += kAhead * teams.size) {
    A sum[kAhead][W] = {};
    for (int k0 = 0; k0 < groups_end; k0 += kGroup) {
      Vector<T, W> held[kAhead][kGroup];
      int32_t row[kGroup];
      A weight[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        row[i] = k0 + i < K ? dest_K[k0 + i] : -1;
        TUTELX_DEVICE_TRAP_UNLESS(row[i] < R, "gather_sum: dest names a row outside [0, R)");
        if (row[i] < 0) continue;
        weight[i] = weight_at<A>(weights, t * K + k0 + i);
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int at = v + a * teams.size;
          if (at < teams.vectors) held[a][i] = load<T, W>(rows + row[i] * D + static_cast<int64_t>(at) * W);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (v + a * teams.size >= teams.vectors) continue;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (row[i] < 0) continue;
#pragma unroll
          for (int w = 0; w < W; ++w) sum[a][w] += weight[i] * widen(held[a][i].at[w]);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = v + a * teams.size;
      if (at >= teams.vectors) continue;
      Vector<T, W> result;
#pragma unroll
      for (int w = 0; w < W; ++w) result.at[w] = narrow<T>(sum[a][w]);
      store<T, W>(out + t * D + static_cast<int64_t>(at) * W, result);
    }
  }
}

template <class T, class Weight>
cudaError_t launch_gather_sum(const void* rows, const int32_t* dest, const void* weights, void* out, int64_t tokens,
                              int64_t K, int64_t R, int64_t D, cudaStream_t stream) {
  if (!team_sizes_ok(tokens, D) || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
  if (tokens == 0 || D == 0) return cudaSuccess;
  return with_width<T>(D, aligned(rows) && aligned(out), [&](auto width) {
    constexpr int W = decltype(width)::value;
    const Teams teams = teams_for(D / W);
    const auto launch = [&](auto group, auto ahead) {
      TUTELX_LAUNCH((gather_sum_kernel<T, Weight, W, decltype(group)::value, decltype(ahead)::value>),
                    team_blocks(tokens, teams), kTeamBlock, 0, stream)
      (static_cast<const T*>(rows), dest, static_cast<const Weight*>(weights), static_cast<T*>(out), tokens,
       static_cast<int>(K), R, teams);
      return cudaGetLastError();
    };
    if (K <= 1) return launch(Constant<1>(), Constant<2>());
    if (K == 2) return launch(Constant<2>(), Constant<2>());
    return launch(Constant<4>(), Constant<1>());
  });
}

}  // namespace tutelx::kernels
