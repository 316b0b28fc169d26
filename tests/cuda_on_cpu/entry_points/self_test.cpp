// Small kernels, each with one fault, to show that the emulation diagnoses it; and one without.
#include "kernels/common.cuh"

namespace {

__global__ void reverse(int* out, int fault) {
  TUTELX_SHARED(int, held, 64);
  const int i = threadIdx.x;
  if (fault != 1) held[i] = i;                     // 1: uninitialised read
  if (fault == 2 && i < 32) __syncthreads();       // 2: divergent barrier
  if (fault != 3) __syncthreads();                 // 3: race between warps
  if (fault == 4 && i == 63) return;               // 4: barrier after an exit
  if (fault == 5 && i % 32 == 31) return;          // 5: shuffle that names an exited lane
  int value = held[fault == 6 ? 64 - i : 63 - i];  // 6: out of bounds
  if (fault == 5) value = __shfl_sync(0xffffffffu, value, 0);
  if (fault == 7) value = __shfl_sync(0x0000ffffu, value, 0);             // 7: callers outside the mask
  if (fault == 8 && i % 32 < 16) value += __ballot_sync(0xffffffffu, 1);  // 8: half a warp never arrives
  if (fault == 9) {                                                       // 9: race within a warp, no __syncwarp
    const int neighbour = held[i ^ 1];
    held[i] = neighbour;
  }
  TUTELX_DEVICE_ASSERT(fault != 10, "asked to fail");
  __syncthreads();
  out[i] = value;
}

}  // namespace

extern "C" int self_test(int* out, int64_t fault) {
  TUTELX_LAUNCH(reverse, fault == 11 ? 0 : 1, 64, 0, nullptr)(out, static_cast<int>(fault));  // 11: empty grid
  return cudaGetLastError();
}
