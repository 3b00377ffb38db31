// skip_layers.h - which layers keep the engine's native cache, so that layers sharing one cache agree about it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace tq {

// kv_sharing_targets[i] is the layer whose pages layer i reads, or -1. Skipped are the layers named in skip_layers and
// the first and last boundary_layers (never more than half of all on either side, as vLLM's get_boundary_skip_layers
// has it). A page has one format: if one of the layers that read it is skipped, all of them are, its owner too. Else
// the native kernel of the one would read compressed bytes of the other as floats.
//
// Fills out with the ascending layer numbers. Returns an empty string, or one sentence that names the argument, what
// came and what is allowed.
std::string align_skip_layers(std::span<const int32_t> kv_sharing_targets, std::span<const int32_t> skip_layers,
                              int boundary_layers, std::vector<int32_t>* out);

// One sentence if target is neither -1 nor the index of a layer that owns its pages; empty if it is.
std::string check_sharing_target(std::span<const int32_t> kv_sharing_targets, size_t layer);

}  // namespace tq
