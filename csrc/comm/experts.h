// The built-in experts inside the pipeline: one chunk of rows after the other, forward and backward.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "traffic.h"
#include "weights.h"

namespace tutelx::comm {

// How the products run: the compiled operator's tiles, one batched product over equally many rows an expert, or a
// product for each expert.
enum class Kernel { tiled, batched, each };

Kernel parse_kernel(const std::string& name);

struct FfnOptions {
  std::string activation;
  Kernel kernel;
  int64_t tile_rows, tile_columns;
};

// What the backward needs of a chunk: rows, pre-activations of gate (if gated) and up.
using Kept = std::vector<at::Tensor>;

class FfnForward {
 public:
  FfnForward(const Traffic& traffic, WeightShards& shards, FfnOptions options, bool keep)
      : traffic_(traffic), shards_(shards), options_(std::move(options)), keep_(keep) {}
  at::Tensor operator()(int64_t chunk, const at::Tensor& rows);
  Kept kept;  // three tensors a chunk

 private:
  const Traffic& traffic_;
  WeightShards& shards_;
  FfnOptions options_;
  bool keep_, gathered_ = false;
  Weights weights_;
};

class FfnBackward {
 public:
  FfnBackward(const Traffic& traffic, WeightShards& shards, FfnOptions options, Kept kept, bool need_weights)
      : traffic_(traffic),
        shards_(shards),
        options_(std::move(options)),
        kept_(std::move(kept)),
        need_weights_(need_weights) {}
  at::Tensor operator()(int64_t chunk, const at::Tensor& grad_out);
  // The gradients of the gathered weights, added up over chunks.
  Weights gradients() const;

 private:
  void add(const Weights& of_chunk);

  const Traffic& traffic_;
  WeightShards& shards_;
  FfnOptions options_;
  Kept kept_;
  bool need_weights_, gathered_ = false;
  Weights weights_, sums_;
};

}  // namespace tutelx::comm
