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

struct StoreArgs {
  StoreParams store;
  DeviceBook book;
  bool vector_key, vector_value;
};

struct DequantArgs {
  DequantParams dequant;
  DeviceBook book;
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
// A partial result: outputs [16][part_dim], softmax references [16], weight sums [16].
constexpr int partial_floats(int part_dim) { return kColumns * (part_dim + 2); }

struct AttendArgs {
  AttendParams attend;
  DeviceBook book;
  int splits;      // of each sequence's tiles; 1: no merge
  float* partial;  // [tiles of columns][KV heads * parts][splits][partial_floats]
  bool vector_query, vector_out;
};

struct MergeArgs {
  AttendArgs attend;
  int part_dim, parts;
};

}  // namespace tq::gpu
