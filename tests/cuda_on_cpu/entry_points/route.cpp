// C entry points: the driver in emulator.py calls these through ctypes.
#include "kernels/route.cu"

using namespace tutelx::kernels;

extern "C" long route_scratch(int64_t T, int64_t K, int64_t E) {
  return static_cast<long>(route_scratch_bytes(T, K, E));
}

extern "C" int route(int64_t step, const int32_t* expert_ids, const int32_t* order, int64_t T, int64_t K, int64_t E,
                     int64_t capacity, int64_t padded, int32_t* dest, int32_t* source, int32_t* counts,
                     int32_t* offsets, void* scratch) {
  const RouteArguments a{expert_ids, order, T, K, E, capacity, padded != 0, dest, source, counts, offsets, scratch};
  if (step == 1) return launch_route_count(a, nullptr);
  if (step == 2) return launch_route_assign(a, nullptr);
  return launch_route(a, nullptr);
}
