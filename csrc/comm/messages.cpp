#include "messages.h"

#include <algorithm>
#include <chrono>

#include "../check.h"

namespace tutelx::comm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Work = c10::intrusive_ptr<c10d::Work>;

constexpr int kTag = 0x7475;

bool has_gloo(const Group& group) {
  for (const c10::Device& device : group->getDeviceTypes())
    if (device.is_cpu()) return backend_name(group, c10::kCPU) == "gloo";
  return false;
}

// Why the work did not end well; empty if it did.
template <class Fn>
std::string failure(const Fn& fn) {
  try {
    fn();
    return "";
  } catch (const std::exception& error) {
    const std::string what = error.what();
    return what.substr(0, what.find('\n'));
  }
}

Messages point_to_point(const Group& group, const at::Tensor& message, int64_t capacity) {
  const int64_t W = group->getSize(), me = group->getRank();
  const Clock::time_point deadline = Clock::now() + group->getBackend(c10::kCPU)->getBackendOptions()->timeout;
  Messages out{at::zeros({W, capacity}, message.options()), std::vector<std::string>(W)};
  out.table[me].narrow(0, 0, message.size(0)).copy_(message);
  std::vector<Work> sends(W), receives(W);
  for (int64_t step = 1; step < W; ++step) {
    const int64_t peer = (me + step) % W;
    out.missing[peer] = failure([&] {
      std::vector<at::Tensor> to{message}, from{out.table[peer]};
      receives[peer] = group->recv(from, static_cast<int>(peer), kTag);
      sends[peer] = group->send(to, static_cast<int>(peer), kTag);
    });
  }
  for (int64_t peer = 0; peer < W; ++peer)
    for (const Work& work : {receives[peer], sends[peer]}) {
      if (!work || !out.missing[peer].empty()) continue;
      const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
      out.missing[peer] = failure([&] { work->wait(std::max(left, milliseconds(1))); });
    }
  return out;
}

Messages all_gather(const Group& group, const at::Tensor& message, int64_t capacity, const c10::Device& device) {
  const int64_t W = group->getSize();
  at::Tensor mine = at::zeros({capacity}, message.options().device(device));
  mine.narrow(0, 0, message.size(0)).copy_(message);
  at::Tensor all = at::empty({W * capacity}, mine.options());
  talk("the agreement", [&] {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // its newer name is missing in torch 2.10
    return group->_allgather_base(all, mine)->wait();
#pragma GCC diagnostic pop
  });
  return {all.view({W, capacity}).to(at::kCPU), std::vector<std::string>(W)};
}

}  // namespace

Messages gather_messages(const Group& group, const at::Tensor& message, int64_t capacity, const c10::Device& device) {
  check_dim(message, "message", 1);
  check_dtype(message, "message", at::kLong);
  TORCH_CHECK_VALUE(message.is_cpu() && message.is_contiguous(), "message must be contiguous and on the CPU");
  TORCH_CHECK_VALUE(message.size(0) <= capacity, "message has ", message.size(0), " numbers, capacity=", capacity);
  return has_gloo(group) ? point_to_point(group, message, capacity) : all_gather(group, message, capacity, device);
}

}  // namespace tutelx::comm
