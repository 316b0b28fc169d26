// How a block is cut up where the work is one row (or one token) of D elements at a time: teams of threads, one row a
// team, several rows a block. A team is a power of two, large enough that a thread moves about kVectorsAThread vectors:
// short rows then share a block, long rows keep many bytes in flight.
#pragma once
#include "common.cuh"

namespace tutelx::kernels {

constexpr int kTeamBlock = 256;
constexpr int kTeamWarps = kTeamBlock / kWarpSize;
constexpr int kVectorsAThread = 4;

struct Teams {
  int size;     // threads a team
  int vectors;  // vectors a row
};

inline Teams teams_for(int64_t vectors) {
  Teams teams{1, static_cast<int>(vectors)};
  while (teams.size < kTeamBlock && static_cast<int64_t>(teams.size) * kVectorsAThread < vectors) teams.size *= 2;
  return teams;
}

inline unsigned team_blocks(int64_t rows, const Teams& teams) {
  return static_cast<unsigned>(ceil_div<int64_t>(rows, kTeamBlock / teams.size));
}

// A grid has at most 2^31-1 blocks; a vector's number, and that of one some rounds ahead, is an int.
inline bool team_sizes_ok(int64_t rows, int64_t D) {
  constexpr int64_t limit = 0x7fffffff - 2 * kVectorsAThread * kTeamBlock;
  return rows >= 0 && rows <= limit && D >= 0 && D <= limit;
}

__device__ __forceinline__ int64_t team_row(const Teams& teams) {
  return static_cast<int64_t>(blockIdx.x) * (kTeamBlock / teams.size) + threadIdx.x / teams.size;
}
__device__ __forceinline__ int team_rank(const Teams& teams) { return threadIdx.x & (teams.size - 1); }

}  // namespace tutelx::kernels
