// The part of CUDA that the kernels use, for a host compiler. Tests only.
//
// Not covered: asynchronous copies, tensor cores, cooperative groups, thread block clusters, weak memory order.
#pragma once
#include <cmath>
#include <limits>

#include "fibers.h"
#include "number_types.h"
#include "shared_memory.h"

// ---- Qualifiers and launches ---------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define TUTELX_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ((void)(stream), emulation::launcher(kernel, grid, block, shared_bytes))
#define TUTELX_SHARED(type, name, count) \
  static const char name##_tag = 0;      \
  const emulation::SharedPtr<type> name = emulation::shared_array<type>(&name##_tag, count, #name)
#define TUTELX_DYNAMIC_SHARED(type, name) \
  const emulation::SharedPtr<type> name = emulation::dynamic_shared_array<type>(#name)
#define TUTELX_DEVICE_ASSERT(condition, message)                                                        \
  do {                                                                                                  \
    if (!(condition)) emulation::fail(emulation::where(emulation::Site::current()) + ": " + (message)); \
  } while (0)
#define TUTELX_DEVICE_TRAP_UNLESS(condition, message) TUTELX_DEVICE_ASSERT(condition, message)
#define TUTELX_CHECK_VECTOR(pointer)                                                                 \
  do {                                                                                               \
    if (reinterpret_cast<uintptr_t>(pointer) % 16) emulation::fail("16-byte access is not aligned"); \
  } while (0)

// ---- Runtime -------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline cudaError_t cudaGetLastError() { return emulation::outcome.failed ? cudaErrorLaunchFailure : cudaSuccess; }

// ---- Built-in variables --------------------------------------------------------------------------------------------

#define threadIdx (emulation::block().current->thread)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().dim)
#define gridDim (emulation::block().grid)

// ---- Vector types --------------------------------------------------------------------------------------------------

struct uint4 {
  uint32_t x, y, z, w;
};

// ---- Barriers ------------------------------------------------------------------------------------------------------

inline void __syncthreads(emulation::Site site = emulation::Site::current()) { emulation::wait_barrier(site); }

inline int __syncthreads_count(int vote, emulation::Site site = emulation::Site::current()) {
  emulation::block().votes += vote != 0;
  emulation::wait_barrier(site);
  return emulation::block().votes_published;
}
inline int __syncthreads_or(int vote, emulation::Site site = emulation::Site::current()) {
  return __syncthreads_count(vote, site) > 0;
}
inline int __syncthreads_and(int vote, emulation::Site site = emulation::Site::current()) {
  return __syncthreads_count(!vote, site) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::exchange(mask, 0, site, /*orders_memory=*/true);
}

// ---- Warp collectives ----------------------------------------------------------------------------------------------

namespace emulation {
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const Site& site) {
  const uint64_t* published = exchange(mask, value, site);
  if (!(existing(mask) >> source & 1)) fail(where(site) + ": shuffle reads a lane outside its mask");
  return take<T>(published, source);
}
inline void check_width(int width, const Site& site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail(where(site) + ": shuffle width is not a power of two");
}
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, const Site& site) {
  const uint64_t* published = exchange(mask, value, site);
  for (unsigned l = 0; l < kWarp; ++l) {
    if (existing(mask) >> l & 1) value = combine(value, take<T>(published, l));
  }
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulation::Site site = emulation::Site::current()) {
  emulation::check_width(width, site);
  const unsigned lane = emulation::block().lane();
  return emulation::shuffle(mask, value, (lane & ~(width - 1u)) | (source & (width - 1u)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulation::Site site = emulation::Site::current()) {
  emulation::check_width(width, site);
  const unsigned lane = emulation::block().lane();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) >= delta ? lane - delta : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Site site = emulation::Site::current()) {
  emulation::check_width(width, site);
  const unsigned lane = emulation::block().lane();
  return emulation::shuffle(mask, value, (lane & (width - 1u)) + delta < unsigned(width) ? lane + delta : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulation::Site site = emulation::Site::current()) {
  emulation::check_width(width, site);
  const unsigned lane = emulation::block().lane(), other = lane ^ unsigned(bits);
  const bool inside = (other & ~(width - 1u)) <= (lane & ~(width - 1u));
  return emulation::shuffle(mask, value, inside ? other : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::current()) {
  const uint64_t* published = emulation::exchange(mask, vote, site);
  unsigned out = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((emulation::existing(mask) >> l & 1) && emulation::take<int>(published, l)) out |= 1u << l;
  }
  return out;
}
inline int __any_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::current()) {
  return __ballot_sync(mask, vote, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::current()) {
  return __ballot_sync(mask, !vote, site) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulation::Site site = emulation::Site::current()) {
  const uint64_t* published = emulation::exchange(mask, value, site);
  unsigned out = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((emulation::existing(mask) >> l & 1) && emulation::take<T>(published, l) == value) out |= 1u << l;
  }
  return out;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::current()) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; }, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::current()) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; }, site);
}

// ---- Atomics, bits, memory -----------------------------------------------------------------------------------------

template <class T>
T atomicAdd(const emulation::SharedPtr<T>& p, T value) {
  return p.atomic_add(value);
}
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float __fdividef(float x, float y) { return x / y; }

using std::max;
using std::min;

// ---- What the test driver asks for ---------------------------------------------------------------------------------

extern "C" inline __attribute__((used)) void emulation_begin(unsigned long seed) {
  emulation::seed = seed;
  emulation::outcome.failed = false;
  emulation::outcome.message.clear();
}
extern "C" inline __attribute__((used)) const char* emulation_message() { return emulation::outcome.message.c_str(); }
