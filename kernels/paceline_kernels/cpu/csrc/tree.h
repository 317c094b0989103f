// Rows whose last tokens form a tree: drafts that a step computes all at once.
//
// A token of a tree must come out as if its path were a plain sequence, to the last bit. So where
// a block of context reaches into the tail it is read once per path, each token at its position:
//
//   context   [0 ...... begin)[tail entries in any order .......... kv_len)
//   a path    [0 ...... begin)[its entries by depth)
//   blocks    |  64  |  64  |  64  |        those in front of the tail are shared by all paths
#pragma once

#include <memory>
#include <vector>

#include "types.h"

namespace paceline {

// From a leaf upwards; queries that several paths share belong to the first of them. Queries are
// ranked path by path, so that those of one path are beside each other in few tiles of lanes.
struct TreePath {
  std::vector<int> entries;  // of the tail, by depth
  int first_rank, last_rank;  // of its own queries, [first, last)
};

struct Tree {
  int begin;                  // position of the tail's roots
  std::vector<int> queries;   // [q_len] by rank
  std::vector<int> depths;    // [q_len] by rank
  std::vector<TreePath> paths;
};

// Null where the row's tail is a chain, or where it has none: positions tell all then.
std::unique_ptr<Tree> plan_tree(const Batch& batch, int row);

}  // namespace paceline
