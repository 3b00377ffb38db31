// centroids_main.cc - prints solve_lloyd_max_like_vllm(head_dim, bits) as JSON, for the comparison with vLLM's own.
#include <cstdio>
#include <cstdlib>

#include "codec/lloyd_max.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const tq::LloydMax q = tq::solve_lloyd_max_like_vllm(std::atoi(argv[1]), std::atoi(argv[2]));
  std::printf("[");
  for (size_t i = 0; i < q.centroids.size(); ++i) std::printf("%s%.12g", i == 0 ? "" : ", ", q.centroids[i]);
  std::printf("]\n");
  return 0;
}
