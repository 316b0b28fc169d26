// What limits which experts a token may choose, and what they are compared by, beside their logits.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "best.h"

namespace tutelx {

// Experts are compared by score + bias if there is a bias, else by logit. Of `groups` groups of as many experts each,
// side by side, only those of the `kept` best are candidates; a group is as good as the sum of its best `best_of`.
struct ChoiceRule {
  std::optional<at::Tensor> bias;  // [E], in what scores are in
  int64_t groups = 1, kept = 1, best_of = 1;

  bool is_plain() const { return !bias && kept == groups; }
  // k: the experts a token chooses.
  void check(int64_t num_experts, int64_t k) const;
};

// Chooses for one token after the other, by a rule that is not plain. W: what scores are in.
template <class W>
class Chooser {
 public:
  Chooser(const ChoiceRule& rule, int64_t num_experts);

  // logit, score [padded(E)]: score is yet to be multiplied with `factor`; -inf after the last logit. The best of the K
  // ids comes first, of equal ones the lower index.
  void choose(const W* logit, const W* score, W factor, int64_t K, int32_t* ids);

 private:
  void keep_groups(const W* value);

  const int64_t E_, groups_, kept_, size_;
  const bool two_;
  const at::Tensor bias_;
  std::vector<W> value_, of_group_, candidate_;
  std::vector<int32_t> group_, scratch_;  // group_: the kept ones, ascending
};

extern template class Chooser<float>;
extern template class Chooser<double>;

}  // namespace tutelx
