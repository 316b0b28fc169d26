// The stream that the exchange runs on, beside the one that computes. On a CPU there are none, and nothing to do.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

namespace tutelx::comm {

class SideStream {
 public:
  explicit SideStream(const c10::Device& device) {
    if (device.is_cpu()) return;
    const c10::impl::VirtualGuardImpl guard(device.type());
    side_ = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
  }

  // Runs fn on the side stream; after_compute: after all that the computing stream has been given so far.
  template <class Fn>
  void run(bool after_compute, const Fn& fn) const {
    if (!side_) return fn();
    if (after_compute) {
      c10::Event ready(side_->device_type());
      ready.record(computing());
      ready.block(*side_);
    }
    const c10::StreamGuard guard(*side_);
    fn();
  }

  // The computing stream goes on only when the side stream has done what it was given so far.
  void join() const {
    if (!side_) return;
    c10::Event done(side_->device_type());
    done.record(*side_);
    done.block(computing());
  }

  // Memory that one stream allocated and the other uses is not handed out again too early.
  void used_beside(const at::Tensor& t) const {
    if (side_ && t.defined()) t.record_stream(*side_);
  }
  void used_in_compute(const at::Tensor& t) const {
    if (side_ && t.defined()) t.record_stream(computing());
  }

 private:
  c10::Stream computing() const { return c10::impl::VirtualGuardImpl(side_->device_type()).getStream(side_->device()); }
  std::optional<c10::Stream> side_;
};

}  // namespace tutelx::comm
