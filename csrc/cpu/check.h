// Checks at the door. Each message names what was given and what was expected.
#pragma once
#include <ATen/ATen.h>

#include <limits>

namespace tutelx {

inline void check_dim(const at::Tensor& t, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, name, " has ", t.dim(), " dimensions, expected ", dim);
}

inline void check_size(const at::Tensor& t, const char* name, int64_t dim, int64_t size, const char* what) {
  TORCH_CHECK_VALUE(t.size(dim) == size, name, ".size(", dim, ")=", t.size(dim), " differs from ", what, "=", size);
}

inline void check_dtype(const at::Tensor& t, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", expected ", dtype);
}

// Rows and slots are numbered with int32.
inline void check_index_range(int64_t count, const char* name) {
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max(), name, "=", count, " exceeds the int32 limit ",
                    std::numeric_limits<int32_t>::max());
}

}  // namespace tutelx
