// x [T,I] times weight [O,I], transposed.
#pragma once
#include <ATen/ATen.h>

#include "matrix.h"

namespace tutelx {

constexpr int64_t kTileTokens = 16, kTileOutputs = 16;  // of one task

// All of it, or some tokens and outputs at a time for a caller that has its own threads.
class TokenLinear {
 public:
  TokenLinear(const at::Tensor& x, const at::Tensor& weight);

  void all() const;
  // tokens: at most kTileTokens.
  void some(int64_t token, int64_t tokens, int64_t output, int64_t outputs) const;
  // Whether the bits of the result do not depend on what is computed at a time.
  bool bits_are_fixed() const;
  int64_t tokens() const { return x_.rows; }
  int64_t outputs() const { return weight_.rows; }
  int64_t products() const { return x_.rows * weight_.rows * x_.cols; }
  const at::Tensor& out() const { return out_; }

 private:
  Matrix x_, weight_, to_;
  at::Tensor out_;
};

}  // namespace tutelx
