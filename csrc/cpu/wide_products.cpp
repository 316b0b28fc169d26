#include "wide_products.h"

#include <ATen/CPUFunctions.h>
#include <ATen/ops/copy_native.h>
#include <torch/library.h>

#include <algorithm>

#include "buffers.h"

namespace tutelx {
namespace {

constexpr int64_t kInner = 1024;  // of a and b at a time, which bounds what the copies take

// A copy in float32, with the order of the strides.
at::Tensor widened(const Matrix& m) {
  const bool flipped = m.col_stride > m.row_stride;
  const at::Tensor from = flipped ? m.transposed().tensor() : m.tensor();
  at::Tensor to = buffer(from.sizes(), from.options().dtype(at::kFloat));
  at::native::copy_(to, from, false);
  return flipped ? to.t() : to;
}

}  // namespace

bool widens(at::ScalarType dtype) {
#if defined(__x86_64__) && defined(__GNUC__)
  // oneDNN has products of bfloat16 from AVX-512 on and of float16 where they are an instruction; torch's own, which
  // are left, take one number at a time.
  static const bool bf16 = !__builtin_cpu_supports("avx512bw"), f16 = !__builtin_cpu_supports("avx512fp16");
  return (dtype == at::kBFloat16 && bf16) || (dtype == at::kHalf && f16);
#else
  return false;
#endif
}

void multiply_wide(const Matrix& a, const Matrix& b, const Matrix& c, bool add) {
  at::Tensor out = c.tensor(), sum = add ? widened(c) : buffer({c.rows, c.cols}, out.options().dtype(at::kFloat));
  if (!add && a.cols == 0) sum.zero_();
  for (int64_t i = 0; i < a.cols; i += kInner) {
    const int64_t n = std::min(kInner, a.cols - i);
    const at::Tensor left = widened(a.block(0, a.rows, i, n)), right = widened(b.block(i, n, 0, b.cols));
    if (i == 0 && !add)
      at::cpu::mm_out(sum, left, right);
    else
      at::cpu::addmm_out(sum, sum, left, right);
  }
  at::native::copy_(out, sum, false);
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CompositeExplicitAutograd, m) { m.impl("widens", &tutelx::widens); }
