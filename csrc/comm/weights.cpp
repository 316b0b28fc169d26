#include "weights.h"

#include <algorithm>

#include "../check.h"

namespace tutelx::comm {
namespace {

constexpr int64_t kKinds = 6, kDown = 2, kDownBias = 5;
constexpr std::array<int64_t, kKinds> kSlicedDim{1, 1, 2, 1, 1, 1};

int64_t numel(const std::vector<int64_t>& shape) {
  int64_t n = shape.empty() ? 0 : 1;
  for (const int64_t s : shape) n *= s;
  return n;
}

at::Tensor flattened(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> flat;
  for (const at::Tensor& t : tensors)
    if (t.defined()) flat.push_back(t.reshape({-1}));
  return at::cat(flat);
}

}  // namespace

WeightShards::WeightShards(Group group, std::vector<Share> shares, int64_t per_expert, int64_t model_begin,
                           int64_t model_dim)
    : group_(std::move(group)),
      shares_(std::move(shares)),
      per_expert_(per_expert),
      model_begin_(model_begin),
      model_dim_(model_dim) {
  for (size_t i = 0; i < shares_.size(); ++i)
    if (shares_[i].rank == group_->getRank()) index_ = static_cast<int64_t>(i);
  TORCH_CHECK_VALUE(index_ >= 0, "rank ", group_->getRank(), " has no share among the ", shares_.size(), " given");
  TORCH_CHECK_VALUE(per_expert > 0 && static_cast<int64_t>(shares_.size()) % per_expert == 0, "per_expert=", per_expert,
                    " does not divide the ", shares_.size(), " shares");
}

std::vector<int64_t> WeightShards::shape(int64_t kind, const Share& share) const {
  std::vector<int64_t> s = own_shape_[kind];
  if (s.empty()) return s;
  s[0] = share.experts;
  s[kSlicedDim[kind]] = kind == kDownBias ? share.model : share.hidden;
  return s;
}

Splits WeightShards::sizes() const {
  Splits out;
  for (const Share& share : shares_) {
    int64_t n = 0;
    for (int64_t kind = 0; kind < kKinds; ++kind) n += numel(shape(kind, share));
    out.push_back(n);
  }
  return out;
}

Splits WeightShards::splits(const Splits& of_share) const {
  Splits out(group_->getSize(), 0);
  for (size_t i = 0; i < shares_.size(); ++i) out[shares_[i].rank] = of_share[i];
  return out;
}

std::vector<at::Tensor> WeightShards::unpack(const at::Tensor& flat, const Share& share) const {
  std::vector<at::Tensor> out(kKinds);
  int64_t begin = 0;
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    const std::vector<int64_t> s = shape(kind, share);
    if (s.empty()) continue;
    out[kind] = flat.narrow(0, begin, numel(s)).view(s);
    begin += numel(s);
  }
  return out;
}

void WeightShards::start_gather(const Weights& mine) {
  own_ = mine;
  for (int64_t kind = 0; kind < kKinds; ++kind)
    own_shape_[kind] = mine[kind].defined() ? mine[kind].sizes().vec() : std::vector<int64_t>();
  for (int64_t kind = 0; kind < kKinds; ++kind)
    TORCH_CHECK_VALUE(!mine[kind].defined() || mine[kind].sizes() == shape(kind, this->mine()), "weight ", kind,
                      " has shape ", mine[kind].sizes(), ", expected ", shape(kind, this->mine()));
  if (shares_.size() == 1) return;
  const at::Tensor flat = flattened({mine.begin(), mine.end()});
  const Splits of_share = sizes();
  const bool alike = std::all_of(of_share.begin(), of_share.end(), [&](int64_t n) { return n == of_share[0]; });
  if (alike && static_cast<int64_t>(shares_.size()) == group_->getSize()) {
    flight_ = std::make_unique<Flight>(group_, flat, bytes_sent_);
    return;
  }
  flight_ = std::make_unique<Flight>(group_, flat.repeat({static_cast<int64_t>(shares_.size())}),
                                     splits(Splits(shares_.size(), flat.numel())), splits(of_share), at::Tensor(),
                                     bytes_sent_);
}

Weights WeightShards::finish_gather() {
  Weights out = own_;
  if (flight_) {
    const at::Tensor flat = flight_->wait();
    flight_.reset();
    std::vector<std::vector<at::Tensor>> parts;
    const Splits of_share = sizes();
    // What arrives is ordered by rank, and so are the shares.
    int64_t begin = 0;
    for (size_t i = 0; i < shares_.size(); ++i) {
      parts.push_back(unpack(flat.narrow(0, begin, of_share[i]), shares_[i]));
      begin += of_share[i];
    }
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      if (own_shape_[kind].empty()) continue;
      std::vector<at::Tensor> experts;
      for (size_t i = 0; i < shares_.size(); i += per_expert_) {
        std::vector<at::Tensor> slices;
        for (int64_t n = 0; n < per_expert_; ++n) slices.push_back(parts[i + n][kind]);
        experts.push_back(per_expert_ == 1 ? slices[0] : at::cat(slices, kSlicedDim[kind]));
      }
      out[kind] = experts.size() == 1 ? experts[0] : at::cat(experts, 0);
    }
  }
  own_ = {};
  at::Tensor& bias = out[kDownBias];
  if (bias.defined() && bias.size(1) != model_dim_)
    bias = at::constant_pad_nd(bias, {model_begin_, model_dim_ - model_begin_ - bias.size(1)});
  return out;
}

Weights WeightShards::reduce(const Weights& gradients) {
  Weights whole = gradients;
  int64_t gathered = 0;
  for (int64_t n = 0; n < per_expert_; ++n) gathered += shares_[n].model;
  if (whole[kDownBias].defined()) whole[kDownBias] = whole[kDownBias].narrow(1, model_begin_, gathered);
  if (shares_.size() == 1) return whole;
  std::vector<at::Tensor> pieces;
  int64_t expert = 0, hidden = 0, model = 0;
  for (size_t i = 0; i < shares_.size(); ++i) {
    const Share& s = shares_[i];
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      if (!whole[kind].defined()) continue;
      const int64_t begin = kind == kDownBias ? model : hidden, size = kind == kDownBias ? s.model : s.hidden;
      pieces.push_back(whole[kind].narrow(0, expert, s.experts).narrow(kSlicedDim[kind], begin, size));
    }
    hidden += s.hidden, model += s.model;
    if ((static_cast<int64_t>(i) + 1) % per_expert_ == 0) expert += s.experts, hidden = 0, model = 0;
  }
  const Splits of_share = sizes();
  Flight flight(group_, flattened(pieces), splits(of_share), splits(Splits(shares_.size(), of_share[index_])),
                at::Tensor(), bytes_sent_);
  const at::Tensor arrived = flight.wait().view({static_cast<int64_t>(shares_.size()), of_share[index_]});
  const at::ScalarType dtype = arrived.scalar_type();
  at::Tensor sum = arrived[0].to(dtype == at::kDouble ? at::kDouble : at::kFloat);
  for (size_t i = 1; i < shares_.size(); ++i) sum = sum + arrived[i];
  const std::vector<at::Tensor> own = unpack(sum.to(dtype), mine());
  Weights out;
  for (int64_t kind = 0; kind < kKinds; ++kind) out[kind] = own[kind];
  return out;
}

}  // namespace tutelx::comm
