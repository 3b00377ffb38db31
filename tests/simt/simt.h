// simt.h - a GPU's execution model on one CPU thread: each lane is a fiber with its own stack, the lanes of a wave meet
// at every operation that crosses lanes, the waves of a block at barriers. Lanes run in a random order, so that what a
// kernel does without a barrier that it needs goes wrong here too. Blocks run one after the other.
//
// Stricter than a GPU: an operation across lanes that not all lanes of a wave reach, or that they reach at different
// places, ends the program with a sentence.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Index {
  unsigned x, y, z;
};

const Index& thread_index();
const Index& block_index();
const Index& block_dim();
const Index& grid_dim();
int lane();

// The block's shared memory: 64 KB, filled with 0xff bytes (NaN) when a block begins.
void* shared_memory(size_t bytes);

void block_barrier();

// Gives `bytes` of mine to the other lanes of the wave and returns what lane i gave by slot(i). what: the operation's
// name, the same for all lanes.
class Exchange {
 public:
  Exchange(const char* what, const void* mine, size_t bytes);
  const void* slot(int lane) const;

 private:
  int parity_;
};

// Runs kernel(arguments) for every thread of a grid.
void launch(void (*kernel)(const void* arguments), const void* arguments, Index grid, Index block, int wave);

// Of the order of lanes, for launches to come.
void set_seed(uint32_t seed);

}  // namespace simt
