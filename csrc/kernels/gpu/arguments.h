// arguments.h - what the host hands to the shared kernels, and the sizes that it needs to launch them.
#pragma once

#include "kernels/gpu/device_book.h"
#include "kernels/kernels.h"

namespace tq::gpu {

// Of a block.
constexpr int kStoreThreads = 128;
constexpr int kDequantThreads = 128;
constexpr int kRotateThreads = 128;
constexpr int kCopyThreads = 256;

// Of a cache's keys; integers have levels, but no table of them.
inline DeviceBook make_key_book(const PagedCache& cache) {
  DeviceBook book = make_device_book(cache.key_book);
  if (cache.format.key_codec == KeyCodec::kInteger) book.unit = 1.0f / kIntegerScale;
  return book;
}
inline DeviceBook make_value_book(const PagedCache& cache) { return make_device_book(cache.value_book); }

struct StoreArgs {
  StoreParams store;
  DeviceBook key_book, value_book;
  bool vector_key, vector_value;
};

struct DequantArgs {
  DequantParams dequant;
  DeviceBook key_book, value_book;
  bool vector_out;  // rows of both outputs begin at multiples of 16 bytes
};

struct RotateArgs {
  RotateParams rotate;
  bool vector_x, vector_out;
};

// Rows of a sequence's range, or vectors, that one lane handles: as many as keep enough bytes in flight.
constexpr int row_unroll(int lanes) { return lanes == 4 ? 2 : 4; }

constexpr int kColumns = 16;     // query columns of a block (attend.cuh)
constexpr int kAttendWarps = 4;  // of a block
constexpr int kMergeThreads = 128;
// Output dimensions of a block: what accumulators in registers allow. Heads of more are shared by several blocks, each
// of which computes the scores for itself.
constexpr int max_part_dim(int wave) { return 4 * wave; }
// Whether attention over rotated values ends in merge_kernel: a rotation goes over all parts.
constexpr bool merges_rotated(int splits, int parts) { return splits > 1 || parts > 1; }
// A partial result: outputs [16][part_dim], softmax references [16], weight sums [16].
constexpr int partial_floats(int part_dim) { return kColumns * (part_dim + 2); }

struct AttendArgs {
  AttendParams attend;
  DeviceBook key_book, value_book;
  int first_tile;  // of columns, of this launch
  int splits;      // of each sequence's tiles; 1: no merge
  float* partial;  // [tiles of columns][KV heads * parts][splits][partial_floats]
  bool vector_query, vector_out;
};

struct MergeArgs {
  AttendArgs attend;
  int part_dim, parts;
};

}  // namespace tq::gpu
