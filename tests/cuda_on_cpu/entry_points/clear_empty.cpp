#include "kernels/clear_empty.cu"

using namespace tutelx::kernels;

extern "C" int clear_empty(void* rows, const int32_t* source, int64_t R, int64_t D, int64_t dtype) {
  return launch_clear_empty(rows, source, R, D, static_cast<DType>(dtype), nullptr);
}
