// encode: gathers token rows into expert rows. encode_backward: sums each token's rows.
#include "gather_sum.cuh"
#include "row_teams.cuh"

namespace tutelx::kernels {
namespace {

// Every row is written exactly once, the empty ones with zeros: the output needs no zero-fill before.
template <class T, int W>
__global__ void __launch_bounds__(kTeamBlock) encode_kernel(const T* __restrict__ x, const int32_t* __restrict__ source,
                                                            T* __restrict__ rows, int64_t R, int K, Teams teams) {
  const int64_t row = team_row(teams);
  if (row >= R) return;
  const int32_t slot = source[row];
  const int64_t D = static_cast<int64_t>(teams.vectors) * W;
  T* to = rows + row * D;
  const T* from = slot < 0 ? nullptr : x + slot / K * D;

  int v = team_rank(teams);
  // All loads of a round before its first store, so that a thread has several in flight.
  for (; v + (kVectorsAThread - 1) * teams.size < teams.vectors; v += kVectorsAThread * teams.size) {
    Vector<T, W> held[kVectorsAThread];
#pragma unroll
    for (int i = 0; i < kVectorsAThread; ++i) {
      const int64_t d = static_cast<int64_t>(v + i * teams.size) * W;
      held[i] = from ? load<T, W>(from + d) : zero_vector<T, W>();
    }
#pragma unroll
    for (int i = 0; i < kVectorsAThread; ++i) {
      store<T, W>(to + static_cast<int64_t>(v + i * teams.size) * W, held[i]);
    }
  }
  for (; v < teams.vectors; v += teams.size) {
    const int64_t d = static_cast<int64_t>(v) * W;
    store<T, W>(to + d, from ? load<T, W>(from + d) : zero_vector<T, W>());
  }
}

}  // namespace

cudaError_t launch_encode(const void* x, const int32_t* source, void* rows, int64_t R, int64_t K, int64_t D,
                          DType dtype, cudaStream_t stream) {
  if (!team_sizes_ok(R, D) || K < 0 || K > INT32_MAX) return cudaErrorInvalidValue;
  if (R == 0 || D == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = TypeIn<decltype(type)>;
    return with_width<T>(D, aligned(x) && aligned(rows), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(D / W);
      TUTELX_LAUNCH((encode_kernel<T, W>), team_blocks(R, teams), kTeamBlock, 0, stream)
      (static_cast<const T*>(x), source, static_cast<T*>(rows), R, static_cast<int>(K), teams);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_encode_backward(const void* drows, const int32_t* dest, void* dx, int64_t T, int64_t K, int64_t D,
                                   DType dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using Element = TypeIn<decltype(type)>;
    return launch_gather_sum<Element, NoWeights>(drows, dest, nullptr, dx, T, K, D, stream);
  });
}

}  // namespace tutelx::kernels
