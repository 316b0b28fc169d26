// clear_empty: zeros in the rows that no slot fills; the others stay as they are.
#include "empty_rows.cuh"

namespace tutelx::kernels {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kTeamBlock)
    clear_empty_kernel(T* __restrict__ rows, const int32_t* __restrict__ source, int64_t R, int vectors) {
  zero_empty_rows<T, W>(source, rows, R, vectors);
}

}  // namespace

cudaError_t launch_clear_empty(void* rows, const int32_t* source, int64_t R, int64_t D, DType dtype,
                               cudaStream_t stream) {
  if (!team_sizes_ok(R, D)) return cudaErrorInvalidValue;
  if (R == 0 || D == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = TypeIn<decltype(type)>;
    return with_width<T>(D, aligned(rows), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Teams teams = teams_for(D / W);
      TUTELX_LAUNCH((clear_empty_kernel<T, W>), blocks_for_tokens_and_empty_rows(0, R, teams), kTeamBlock, 0, stream)
      (static_cast<T*>(rows), source, R, teams.vectors);
      return cudaGetLastError();
    });
  });
}

}  // namespace tutelx::kernels
