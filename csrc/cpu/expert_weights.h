// The weights of all experts as one kind of thing: E matrices, be they a list or slices of one 3-D tensor.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "buffers.h"
#include "gemm.h"

namespace tutelx {

// `rank` is that of one expert's parameter: 2 for a matrix [out,in], 1 for a bias [out].
class ExpertParameter {
 public:
  ExpertParameter(at::TensorList tensors, int64_t rank, const char* name, int64_t num_experts)
      : tensors_(tensors.vec()), rank_(rank) {
    if (tensors_.empty()) return;
    stacked_ = tensors_[0].dim() == rank + 1;
    const int64_t given = stacked_ ? tensors_[0].size(0) : static_cast<int64_t>(tensors_.size());
    TORCH_CHECK_VALUE(given == num_experts, name, " holds ", given, " experts, the map has ", num_experts);
    TORCH_CHECK_VALUE(!stacked_ || tensors_.size() == 1, name, " is a list of ", tensors_.size(),
                      " stacked tensors, expected one");
    const at::IntArrayRef shape = stacked_ ? tensors_[0].sizes().slice(1) : tensors_[0].sizes();
    for (size_t e = 0; e < tensors_.size(); ++e) {
      TORCH_CHECK_VALUE(stacked_ || tensors_[e].sizes() == shape, name, "[", e, "] has shape ", tensors_[e].sizes(),
                        ", ", name, "[0] has ", shape);
      TORCH_CHECK_VALUE(static_cast<int64_t>(shape.size()) == rank, name, " of one expert has ", shape.size(),
                        " dimensions, expected ", rank);
      check_dtype(tensors_[e], name, tensors_[0].scalar_type());
    }
    shape_ = shape.vec();
  }

  explicit operator bool() const { return !tensors_.empty(); }
  int64_t size(int64_t dim) const { return shape_[dim]; }
  at::ScalarType dtype() const { return tensors_[0].scalar_type(); }

  Matrix matrix(int64_t expert) const {
    if (!stacked_) return matrix_of(tensors_[expert]);
    const at::Tensor& t = tensors_[0];
    return {static_cast<char*>(t.data_ptr()) + expert * t.stride(0) * t.element_size(),
            t.size(1),
            t.size(2),
            t.stride(1),
            t.stride(2),
            t.scalar_type()};
  }
  // Whether the inputs of each expert's outputs lie side by side.
  bool side_by_side() const {
    return std::all_of(tensors_.begin(), tensors_.end(), [](const at::Tensor& t) { return t.stride(-1) == 1; });
  }
  template <class T>
  const T* vector(int64_t expert) const {
    if (tensors_.empty()) return nullptr;
    return stacked_ ? tensors_[0].const_data_ptr<T>() + expert * tensors_[0].stride(0)
                    : tensors_[expert].const_data_ptr<T>();
  }
  // Biases are read as plain arrays.
  ExpertParameter contiguous_vectors() const {
    ExpertParameter out = *this;
    for (at::Tensor& t : out.tensors_) t = t.contiguous();
    return out;
  }

  // Buffers for the gradient, one per parameter. An expert without rows gets zeros; in a list it gets an empty tensor
  // unless `zero_unused`, so that the caller can tell "no gradient" from "zero".
  std::vector<at::Tensor> gradients(const std::vector<int64_t>& rows_of, bool zero_unused) const {
    std::vector<at::Tensor> out;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (stacked_ || rows_of[i] > 0)
        out.push_back(buffer_like(tensors_[i]));
      else
        out.push_back(zero_unused ? at::zeros_like(tensors_[i]) : buffer({0}, tensors_[i].options()));
    }
    if (stacked_)
      for (size_t e = 0; e < rows_of.size(); ++e)
        if (rows_of[e] == 0) out[0].select(0, static_cast<int64_t>(e)).zero_();
    return out;
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<int64_t> shape_;
  int64_t rank_;
  bool stacked_ = false;
};

}  // namespace tutelx
