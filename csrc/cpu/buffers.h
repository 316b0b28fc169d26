// Memory for results; what is large is kept when it is freed. Fresh pages cost several times what the operators
// themselves do: the system clears and maps each page on first touch, and malloc gives large blocks back at once. For
// small ones, the way through the dispatcher costs as much.
#pragma once
#include <ATen/ATen.h>

namespace tutelx {

// As at::empty and at::empty_like on CPU, on memory that an earlier result may have had. The second keeps dense
// strides.
at::Tensor buffer(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor buffer_like(const at::Tensor& like);

}  // namespace tutelx
