// Rows that no slot fills are written as zeros, by whoever writes all the others.
#pragma once
#include <algorithm>

#include "row_teams.cuh"

namespace tutelx::kernels {

// All warps of the grid share the rows. A lane looks at one row; the whole warp clears those that are empty. The rows
// of a warp lie far apart, as empty ones come in runs.
template <class T, int W>
__device__ __forceinline__ void zero_empty_rows(const int32_t* __restrict__ source, T* __restrict__ rows, int64_t R,
                                                int vectors) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t D = static_cast<int64_t>(vectors) * W;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kTeamWarps;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeamWarps + threadIdx.x / kWarpSize; first < R;
       first += warps * kWarpSize) {
    const int64_t mine = first + lane * warps;
    unsigned empty = __ballot_sync(kAllLanes, mine < R && source[mine] < 0);
    for (; empty != 0; empty &= empty - 1) {
      T* row = rows + (first + (__ffs(empty) - 1) * warps) * D;
      for (int v = lane; v < vectors; v += kWarpSize) {
        store<T, W>(row + static_cast<int64_t>(v) * W, zero_vector<T, W>());
      }
    }
  }
}

// A sparse padded map has many more empty rows than tokens: they ask for blocks as well.
inline unsigned blocks_for_tokens_and_empty_rows(int64_t tokens, int64_t R, const Teams& teams) {
  constexpr int64_t rows_a_warp = 8;
  return std::max(team_blocks(tokens, teams), static_cast<unsigned>(ceil_div<int64_t>(R, rows_a_warp * kTeamWarps)));
}

}  // namespace tutelx::kernels
