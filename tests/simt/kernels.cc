// kernels.cc - the HIP kernels as the host's compiler sees them.
#include "hip/kernels.hip"
