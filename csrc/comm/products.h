// Feed-forward experts as torch's own matrix products: one batched product over equally many rows an expert, or a
// product for each expert, where no kernel is compiled for the device.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <tuple>
#include <vector>

#include "weights.h"

namespace tutelx::comm {

// Rows [begin, begin + size) of expert e, or those of all experts at once (e = -1).
struct Segment {
  int64_t expert, begin, size;
};

// offsets [E+1] int32 on the CPU. batched: all experts in one, as equally many rows are known to lie behind each.
std::vector<Segment> segments_of(const at::Tensor& offsets, bool batched);

// rows [R,M] -> out [R,M], and the pre-activations of gate and up [R,H]; gate's has no elements if there is no gate.
std::tuple<at::Tensor, at::Tensor, at::Tensor> products(const at::Tensor& rows, const std::vector<Segment>& segments,
                                                        const Weights& weights, const std::string& activation);

// grad_rows [R,M] and the gradients of the weights, if needed.
std::tuple<at::Tensor, Weights> products_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                                                  const at::Tensor& gate_pre, const at::Tensor& up_pre,
                                                  const std::vector<Segment>& segments, const Weights& weights,
                                                  const std::string& activation, bool need_weights);

}  // namespace tutelx::comm
