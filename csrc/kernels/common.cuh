// What all kernels share: the switch between nvcc and the tests' CPU emulation, number types, 16-byte accesses, warp
// reductions.
//
// Kernels say LAUNCH, SHARED, DYNAMIC_SHARED and SharedPtr instead of <<<>>>, __shared__ and T*, so that the emulation
// can watch every access to shared memory.
#pragma once
#include "launch.h"

#if defined(TUTELX_CUDA_EMULATION)

namespace tutelx::kernels {
template <class T>
using SharedPtr = emulation::SharedPtr<T>;
}  // namespace tutelx::kernels

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

#define TUTELX_CHECK_VECTOR(pointer)
#define TUTELX_LAUNCH(kernel, grid, block, shared_bytes, stream) kernel<<<grid, block, shared_bytes, stream>>>
#define TUTELX_SHARED(type, name, count) __shared__ type name[count]
#define TUTELX_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char tutelx_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(tutelx_dynamic_shared)
// Unlike assert, stays in release builds: an id out of range would write out of bounds.
#define TUTELX_DEVICE_ASSERT(condition, message)                            \
  do {                                                                      \
    if (!(condition)) __assert_fail(message, __FILE__, __LINE__, __func__); \
  } while (0)
// The same without a message: a call that never happens would still cost a kernel registers.
#define TUTELX_DEVICE_TRAP_UNLESS(condition, message) \
  do {                                                \
    if (!(condition)) __trap();                       \
  } while (0)

namespace tutelx::kernels {
template <class T>
using SharedPtr = T*;
}  // namespace tutelx::kernels

#endif

namespace tutelx::kernels {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class I>
constexpr __host__ __device__ I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// ---- Numbers: f64 computes in double, everything else in float, and results are rounded once ------------------------

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  return __float2half_rn(x);
}

// Within 2 ulp where the divisor is in [1, 2], as it is below, and without the call that the exact division needs.
__device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double divide(double x, double y) { return x / y; }

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  const A e = exp(x < 0 ? x : -x);  // never overflows, so that tiny values keep their ratios
  return divide(x < 0 ? e : A(1), A(1) + e);
}

// ---- Vectors of 16 bytes, or of one element where pointers or D do not allow them -----------------------------------

constexpr int kVectorBytes = 16;

template <class T, int W>
struct Vector {
  T at[W];
};

template <class T, int W>
__device__ __forceinline__ Vector<T, W> load(const T* p) {
  Vector<T, W> v;
  if constexpr (sizeof(v) == kVectorBytes) {
    TUTELX_CHECK_VECTOR(p);
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    memcpy(&v, &bits, sizeof(v));
  } else {
    static_assert(W == 1, "a vector has 16 bytes or one element");
    v.at[0] = *p;
  }
  return v;
}

template <class T, int W>
__device__ __forceinline__ void store(T* p, const Vector<T, W>& v) {
  if constexpr (sizeof(v) == kVectorBytes) {
    TUTELX_CHECK_VECTOR(p);
    uint4 bits;
    memcpy(&bits, &v, sizeof(v));
    *reinterpret_cast<uint4*>(p) = bits;
  } else {
    *p = v.at[0];
  }
}

// All bits zero is zero in every number type used here.
template <class T, int W>
__device__ __forceinline__ Vector<T, W> zero_vector() {
  Vector<T, W> v;
  memset(&v, 0, sizeof(v));
  return v;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// ---- Warp reductions -----------------------------------------------------------------------------------------------

// Over `width` lanes (a power of two); every lane gets the sum, added up in the same order everywhere.
template <class A>
__device__ __forceinline__ A warp_sum(A x, int width = kWarpSize) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ uint32_t warp_max_bits(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
__device__ __forceinline__ uint64_t warp_max_bits(uint64_t x) { return warp_max(x); }

// ---- Choosing template arguments at run time -----------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};
template <class Tag>
using TypeIn = typename Tag::type;

// Calls launch(Type<T>()) with the C++ type of `dtype`.
template <class Launch>
cudaError_t with_type(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::f32:
      return launch(Type<float>());
    case DType::f64:
      return launch(Type<double>());
    case DType::bf16:
      return launch(Type<bf16>());
    case DType::f16:
      return launch(Type<f16>());
  }
  return cudaErrorInvalidValue;
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls launch(Constant<W>()) with the widest vector that D and the pointers allow.
template <class T, class Launch>
cudaError_t with_width(int64_t D, bool all_aligned, const Launch& launch) {
  constexpr int wide = kVectorBytes / static_cast<int>(sizeof(T));
  if (all_aligned && D % wide == 0) return launch(Constant<wide>());
  return launch(Constant<1>());
}

}  // namespace tutelx::kernels
