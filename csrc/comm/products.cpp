#include "products.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "../check.h"

namespace tutelx::comm {
namespace {

enum Kind { kGate, kUp, kDown, kGateBias, kUpBias, kDownBias };

at::Tensor activate(const at::Tensor& gate, const at::Tensor& up, const std::string& kind) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tutelx::activation", "")
          .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view)>();
  return op.call(gate, up.defined() ? std::optional(up) : std::nullopt, kind);
}

std::tuple<at::Tensor, at::Tensor> activate_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                     const at::Tensor& up, const std::string& kind) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tutelx::activation_backward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                    const std::optional<at::Tensor>&, c10::string_view)>();
  return op.call(grad, gate, up.defined() ? std::optional(up) : std::nullopt, kind);
}

// The rows of a segment: [n, D], or [E, C, D] for all experts at once.
at::Tensor rows_of(const at::Tensor& t, const Segment& s, int64_t experts) {
  const at::Tensor part = t.narrow(0, s.begin, s.size);
  return s.expert >= 0 ? part : part.view({experts, s.size / experts, t.size(1)});
}

// The weight of a segment's expert, or all of them.
at::Tensor weight_of(const at::Tensor& w, const Segment& s) { return s.expert >= 0 ? w.select(0, s.expert) : w; }

at::Tensor linear(const at::Tensor& x, const Weights& w, Kind weight, Kind bias, const Segment& s) {
  at::Tensor out = at::matmul(x, weight_of(w[weight], s).transpose(-2, -1));
  if (w[bias].defined()) out.add_(weight_of(w[bias], s).unsqueeze(-2));
  return out;
}

}  // namespace

std::vector<Segment> segments_of(const at::Tensor& offsets, bool batched) {
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  const int64_t experts = offsets.size(0) - 1;
  if (batched && experts > 0) return {{-1, 0, offset[experts]}};
  std::vector<Segment> out;
  for (int64_t e = 0; e < experts; ++e) out.push_back({e, offset[e], offset[e + 1] - offset[e]});
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> products(const at::Tensor& rows, const std::vector<Segment>& segments,
                                                        const Weights& w, const std::string& activation) {
  const int64_t R = rows.size(0), H = w[kUp].size(1), E = w[kUp].size(0);
  const bool gated = w[kGate].defined();
  const at::Tensor out = at::empty_like(rows), up_pre = at::empty({R, H}, rows.options());
  const at::Tensor gate_pre = at::empty({gated ? R : 0, gated ? H : 0}, rows.options());
  for (const Segment& s : segments) {
    const at::Tensor x = rows_of(rows, s, E);
    const at::Tensor up = linear(x, w, kUp, kUpBias, s);
    at::Tensor hidden;
    if (gated) {
      const at::Tensor gate = linear(x, w, kGate, kGateBias, s);
      hidden = activate(gate, up, activation);
      rows_of(gate_pre, s, E).copy_(gate);
    } else {
      hidden = activate(up, {}, activation);
    }
    rows_of(up_pre, s, E).copy_(up);
    rows_of(out, s, E).copy_(linear(hidden, w, kDown, kDownBias, s));
  }
  return {out, gate_pre, up_pre};
}

std::tuple<at::Tensor, Weights> products_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                                                  const at::Tensor& gate_pre, const at::Tensor& up_pre,
                                                  const std::vector<Segment>& segments, const Weights& w,
                                                  const std::string& activation, bool need_weights) {
  const int64_t E = w[kUp].size(0);
  const bool gated = w[kGate].defined();
  const at::Tensor grad_rows = at::empty_like(rows);
  Weights grads;
  if (need_weights)
    for (size_t kind = 0; kind < w.size(); ++kind)
      if (w[kind].defined()) grads[kind] = at::empty_like(w[kind]);
  const auto keep = [&](Kind weight, Kind bias, const Segment& s, const at::Tensor& grad, const at::Tensor& input) {
    if (!need_weights) return;
    weight_of(grads[weight], s).copy_(at::matmul(grad.transpose(-2, -1), input));
    if (grads[bias].defined()) weight_of(grads[bias], s).copy_(grad.sum(-2));
  };
  for (const Segment& s : segments) {
    const at::Tensor x = rows_of(rows, s, E), dy = rows_of(grad_out, s, E), up = rows_of(up_pre, s, E);
    const at::Tensor gate = gated ? rows_of(gate_pre, s, E) : at::Tensor();
    const at::Tensor grad_hidden = at::matmul(dy, weight_of(w[kDown], s));
    at::Tensor grad_gate, grad_up;
    if (gated)
      std::tie(grad_gate, grad_up) = activate_backward(grad_hidden, gate, up, activation);
    else
      grad_up = std::get<0>(activate_backward(grad_hidden, up, {}, activation));
    at::Tensor grad_x = at::matmul(grad_up, weight_of(w[kUp], s));
    if (gated) grad_x.add_(at::matmul(grad_gate, weight_of(w[kGate], s)));
    rows_of(grad_rows, s, E).copy_(grad_x);
    if (need_weights)
      keep(kDown, kDownBias, s, dy, gated ? activate(gate, up, activation) : activate(up, {}, activation));
    keep(kUp, kUpBias, s, grad_up, x);
    if (gated) keep(kGate, kGateBias, s, grad_gate, x);
  }
  return {grad_rows, grads};
}

}  // namespace tutelx::comm
