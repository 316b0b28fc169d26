// A process group, what its backend can reach, and errors of other ranks.
#pragma once
#include <ATen/ATen.h>

#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace tutelx::comm {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Splits = std::vector<int64_t>;

// Another rank died, did not call or is too late. In Python: tutelx.errors.RankFailedError.
struct RankFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs what talks to other ranks; whatever the backend throws becomes RankFailed.
template <class Fn>
auto talk(const char* what, const Fn& fn) -> decltype(fn()) {
  try {
    return fn();
  } catch (const std::exception& error) {
    throw RankFailed(std::string(what) + " failed, because a rank died, did not call or is too late: " + error.what());
  }
}

inline std::string backend_name(const Group& group, c10::DeviceType device) {
  return group->getBackend(device)->getBackendName();
}

// The backend has no all-to-all on this device, so that rows go through pinned host memory.
inline bool is_staged(const Group& group, const c10::Device& device) {
  return !device.is_cpu() && backend_name(group, device.type()) == "gloo";
}

}  // namespace tutelx::comm
