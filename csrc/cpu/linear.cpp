// linear: x [T,I] times weight [O,I], for the few tokens of a decoding step. A library's product wakes its threads and
// plans for matrices; this one reads the weight once, and its bits do not depend on the tokens beside a token.
#include "linear.h"

#include <torch/library.h>

#include "../check.h"
#include "buffers.h"
#include "forward.h"
#include "gemm.h"
#include "parallel.h"

namespace tutelx {

TokenLinear::TokenLinear(const at::Tensor& x, const at::Tensor& weight) {
  check_dim(x, "x", 2);
  check_dim(weight, "weight", 2);
  check_floating(x, "x");
  check_dtype(weight, "weight", x.scalar_type());
  check_size(x, "x", 1, weight.size(1), "the weight's inputs");
  out_ = buffer({x.size(0), weight.size(0)}, x.options());
  x_ = matrix_of(x), weight_ = matrix_of(weight), to_ = matrix_of(out_);
}

void TokenLinear::some(int64_t token, int64_t tokens, int64_t output, int64_t outputs) const {
  multiply(x_.block(token, tokens, 0, x_.cols), weight_.block(output, outputs, 0, x_.cols).transposed(),
           to_.block(token, tokens, output, outputs));
}

bool TokenLinear::bits_are_fixed() const {
  return x_.col_stride == 1 && weight_.col_stride == 1 && FewRows::can(kTileTokens, x_.dtype);
}

void TokenLinear::all() const {
  const int64_t T = tokens(), O = outputs();
  // Each tile lays its tokens out anew.
  const int64_t most = T <= kTileTokens ? kTileOutputs : 4 * kTileOutputs, across = (O + most - 1) / most;
  const auto tile = [&](int64_t i) {
    const int64_t token = i / across * kTileTokens, output = i % across * most;
    some(token, std::min(kTileTokens, T - token), output, std::min(most, O - output));
  };
  parallel_items((T + kTileTokens - 1) / kTileTokens * across, tile, products() >= kWakeProducts);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  const TokenLinear product(x, weight);
  product.all();
  return product.out();
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("linear", &tutelx::linear); }
