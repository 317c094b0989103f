#include "tree.h"

#include <algorithm>

namespace paceline {

std::unique_ptr<Tree> plan_tree(const Batch& batch, int row) {
  if (!batch.cu_tree) return nullptr;
  const int32_t* parents = batch.tree_parents + batch.cu_tree[row];
  const int tail = batch.cu_tree[row + 1] - batch.cu_tree[row];
  bool is_chain = true;
  for (int j = 0; j < tail; ++j) is_chain &= parents[j] == j - 1;
  if (is_chain) return nullptr;

  const int first_query = tail - (batch.cu_q[row + 1] - batch.cu_q[row]);
  std::vector<bool> is_leaf(tail, true), is_ranked(tail, false);
  for (int j = 0; j < tail; ++j) {
    if (parents[j] >= 0) is_leaf[parents[j]] = false;
  }
  auto tree = std::make_unique<Tree>();
  tree->begin = batch.kv_lens[row] - tail;
  // What hangs under a query comes behind it, so it is a query too: every query is above a leaf
  // that is one.
  for (int leaf = first_query; leaf < tail; ++leaf) {
    if (!is_leaf[leaf]) continue;
    TreePath path;
    for (int j = leaf; j >= 0; j = parents[j]) path.entries.push_back(j);
    std::reverse(path.entries.begin(), path.entries.end());
    path.first_rank = int(tree->queries.size());
    for (int depth = 0; depth < int(path.entries.size()); ++depth) {
      const int entry = path.entries[depth];
      if (entry < first_query || is_ranked[entry]) continue;
      is_ranked[entry] = true;
      tree->queries.push_back(entry - first_query);
      tree->depths.push_back(depth);
    }
    path.last_rank = int(tree->queries.size());
    tree->paths.push_back(std::move(path));
  }
  return tree;
}

}  // namespace paceline
