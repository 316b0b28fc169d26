#include "few_rows.h"

#include <algorithm>
#include <vector>

namespace tutelx {
namespace {

const FewRowsKernel* find_kernel(at::ScalarType dtype) {
  const FewRowsKernel* const widest = few_rows_avx512(dtype);
  return widest ? widest : few_rows_avx2(dtype);
}

const FewRowsKernel* kernel_of(at::ScalarType dtype) {
  static const FewRowsKernel *const f32 = find_kernel(at::kFloat), *const bf16 = find_kernel(at::kBFloat16),
                                    *const f16 = find_kernel(at::kHalf);
  return dtype == at::kFloat ? f32 : dtype == at::kBFloat16 ? bf16 : dtype == at::kHalf ? f16 : nullptr;
}

}  // namespace

bool FewRows::can(int64_t rows, at::ScalarType dtype) { return rows <= kMostRows && kernel_of(dtype); }

void FewRows::lay_out(const Rows& rows) {
  kernel_ = kernel_of(rows.of.dtype);
  x_.count = rows.of.rows;
  x_.bytes = rows.of.cols * static_cast<int64_t>(c10::elementSize(rows.of.dtype));
  const int64_t chunks = std::max<int64_t>(1, (x_.bytes + kChunk - 1) / kChunk);
  x_.chunk = std::max(kLine, ((x_.bytes + chunks - 1) / chunks + kLine - 1) / kLine * kLine);
  thread_local std::vector<char> memory;
  memory.resize(chunks * x_.count * kernel_->row_stride + kLine);
  char* const to = memory.data() + (-reinterpret_cast<intptr_t>(memory.data()) & (kLine - 1));
  x_.rows = to;
  kernel_->lay_out(rows, x_.bytes, x_.chunk, to);
}

void FewRows::times(const Matrix& b, const Matrix& c, const char* after) const { kernel_->multiply(x_, b, c, after); }

}  // namespace tutelx
