// The weights of one layer's experts, in slices on several ranks: gathered for one call, their gradients sent home.
//
// Legend: E experts, H hidden dim, M model dim.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <memory>
#include <vector>

#include "exchange.h"

namespace tutelx::comm {

// gate, up [E,H,M], down [E,M,H], gate_bias, up_bias [E,H], down_bias [E,M]; an undefined tensor is one that these
// experts do not have. A rank's slice is cut along H, that of down_bias along M.
using Weights = std::array<at::Tensor, 6>;

// What one of the ranks that gather from each other owns.
struct Share {
  int64_t rank, experts, hidden, model;  // experts, and the sizes of its slices of H and M
};

class WeightShards {
 public:
  // shares: of the ranks that gather from each other, in the order of experts, then slices; `per_expert` consecutive
  // ones share their experts. model_begin, model_dim: where the gathered part of down_bias lies in all of it; the rest
  // of it is zero here and added by other ranks.
  WeightShards(Group group, std::vector<Share> shares, int64_t per_expert, int64_t model_begin, int64_t model_dim);

  // Starts to gather; finish_gather waits and puts the experts together.
  void start_gather(const Weights& mine);
  Weights finish_gather();

  // Sends each rank the gradients of its share and adds up what arrives, in the order of the ranks and in float32
  // (float64 for float64).
  Weights reduce(const Weights& gradients);

  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  // The size of a share of the n-th kind of weight.
  std::vector<int64_t> shape(int64_t kind, const Share& share) const;
  std::vector<at::Tensor> unpack(const at::Tensor& flat, const Share& share) const;
  Splits sizes() const;
  Splits splits(const Splits& of_share) const;
  const Share& mine() const { return shares_[index_]; }

  Group group_;
  std::vector<Share> shares_;
  int64_t per_expert_, model_begin_, model_dim_, index_ = -1;
  std::array<std::vector<int64_t>, 6> own_shape_;  // empty where there is none
  std::unique_ptr<Flight> flight_;
  Weights own_;
  int64_t bytes_sent_ = 0;
};

}  // namespace tutelx::comm
