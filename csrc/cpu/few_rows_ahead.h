// Requests for weights that are used later, made while others are summed: into the second cache, and in the order in
// which they lie in memory, in whichever order they are used. The hardware does not look past a page, drops requests
// while many are under way, and reads slower out of order.
#pragma once
#include <cstdint>

#include "few_rows_kernel.h"

namespace tutelx {
namespace {

// Weights in the order in which they lie, from some output on, in parts of `part` bytes, `parts` to an output.
struct Stream {
  const char *weights, *after;  // after: what follows the last output
  int64_t outputs, stride, part, parts;

  const char* at(int64_t i) const {
    const int64_t output = parts == 1 ? i : i / parts, byte = (i - output * parts) * part;
    return (output < outputs ? weights + output * stride : after + (output - outputs) * stride) + byte;
  }
};

// Outputs that some rows are multiplied with.
struct Group {
  const char* weights;             // of the first
  int64_t stride, bytes, outputs;  // bytes between two outputs' weights, and of an output's
};

// The passes over a group, of which one is `pass`, together ask for the parts of the stream from `ask` on.
struct Ahead {
  const Stream& stream;
  int64_t ask, pass, passes;
};

// Both below: what is asked for with every line of weights that O outputs from some on are multiplied with.
//
// One line each of O parts, by one pass after the other; those whose turn it is not ask for what is there already.
template <int O>
class AskInTurns {
 public:
  AskInTurns(const Group& of, const Ahead& a, int64_t output)
      : at_(of.weights + output * of.stride), stride_(of.stride) {
    const int64_t turn = (a.pass * of.outputs + output) / O, part = a.ask + turn / a.passes * O;
    if (turn % a.passes != 0) return;
    at_ = a.stream.at(part);
    stride_ = O > 1 ? a.stream.at(part + 1) - at_ : 0;
  }
  void line() {
    for (int o = 0; o < O; ++o) __builtin_prefetch(at_ + o * stride_, 0, 2);
    at_ += kLine;
  }

 private:
  const char* at_;
  int64_t stride_;
};

// O parts line by line, by each pass its share of them.
template <int O>
class AskEvenly {
 public:
  AskEvenly(const Group& of, const Ahead& a, int64_t output) : passes_(a.passes) {
    const int64_t before = a.pass * O * (of.bytes / kLine);
    at_ = a.stream.at(a.ask + output) + before / passes_ * kLine;
    due_ = before % passes_;
  }
  void line() {
    for (due_ += O; due_ >= passes_; due_ -= passes_, at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char* at_;
  int64_t passes_, due_;
};

}  // namespace
}  // namespace tutelx
