#include "planner/skip_layers.h"

#include <algorithm>

namespace tq {

std::string check_sharing_target(std::span<const int32_t> kv_sharing_targets, size_t layer) {
  const int32_t target = kv_sharing_targets[layer];
  const auto num_layers = static_cast<int64_t>(kv_sharing_targets.size());
  const std::string who = "layers[" + std::to_string(layer) + "].kv_sharing_target is " + std::to_string(target);
  if (target < -1 || target >= num_layers) {
    return who + "; it must be -1 or the index of one of the " + std::to_string(num_layers) + " layers";
  }
  if (target != -1 && kv_sharing_targets[target] != -1) {
    return who + ", which shares pages itself; it must be a layer that owns its pages";
  }
  return "";
}

std::string align_skip_layers(std::span<const int32_t> kv_sharing_targets, std::span<const int32_t> skip_layers,
                              int boundary_layers, std::vector<int32_t>* out) {
  const auto num_layers = static_cast<int32_t>(kv_sharing_targets.size());
  if (num_layers == 0) return "kv_sharing_targets is empty; there must be at least one layer";
  if (boundary_layers < 0) {
    return "boundary_layers is " + std::to_string(boundary_layers) + "; it must not be negative";
  }
  std::vector<int32_t> owner(kv_sharing_targets.begin(), kv_sharing_targets.end());
  for (int32_t i = 0; i < num_layers; ++i) {
    if (std::string sentence = check_sharing_target(kv_sharing_targets, i); !sentence.empty()) return sentence;
    if (owner[i] == -1) owner[i] = i;
  }

  std::vector<bool> skipped(num_layers);  // by owner of the pages
  for (size_t i = 0; i < skip_layers.size(); ++i) {
    if (skip_layers[i] < 0 || skip_layers[i] >= num_layers) {
      return "skip_layers[" + std::to_string(i) + "] is " + std::to_string(skip_layers[i]) + "; layers go from 0 to " +
             std::to_string(num_layers - 1);
    }
    skipped[owner[skip_layers[i]]] = true;
  }
  const int32_t boundary = std::min(boundary_layers, num_layers / 2);
  for (int32_t i = 0; i < boundary; ++i) {
    skipped[owner[i]] = true;
    skipped[owner[num_layers - 1 - i]] = true;
  }

  out->clear();
  for (int32_t i = 0; i < num_layers; ++i) {
    if (skipped[owner[i]]) out->push_back(i);
  }
  return "";
}

}  // namespace tq
