// linear: x [T,I] times weight [O,I], for the few tokens of a decoding step. A library's product wakes its threads and
// plans for matrices; this one reads the weight once, and its bits do not depend on the tokens beside a token.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../check.h"
#include "forward.h"
#include "gemm.h"
#include "parallel.h"

namespace tutelx {
namespace {

constexpr int64_t kTileRows = 64, kTileOutputs = 16;
constexpr int64_t kWakeProducts = int64_t{1} << 21;  // a second thread takes longer to wake than fewer take

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  check_dim(x, "x", 2);
  check_dim(weight, "weight", 2);
  check_floating(x, "x");
  check_dtype(weight, "weight", x.scalar_type());
  check_size(x, "x", 1, weight.size(1), "the weight's inputs");
  const int64_t T = x.size(0), O = weight.size(0), I = x.size(1);
  const at::Tensor out = at::empty({T, O}, x.options());
  const Matrix a = matrix_of(x), b = matrix_of(weight), c = matrix_of(out);
  const int64_t across = (O + kTileOutputs - 1) / kTileOutputs, tiles = (T + kTileRows - 1) / kTileRows * across;
  const auto tile = [&](int64_t i) {
    const int64_t row = i / across * kTileRows, rows = std::min(kTileRows, T - row);
    const int64_t output = i % across * kTileOutputs, outputs = std::min(kTileOutputs, O - output);
    multiply(a.block(row, rows, 0, I), b.block(output, outputs, 0, I).transposed(),
             c.block(row, rows, output, outputs));
  };
  if (T * O * I < kWakeProducts) {
    const OneThreadProducts guard;
    for (int64_t i = 0; i < tiles; ++i) tile(i);
  } else {
    parallel_items(tiles, tile);
  }
  return out;
}

}  // namespace tutelx

TORCH_LIBRARY_IMPL(tutelx, CPU, m) { m.impl("linear", &tutelx::linear); }
