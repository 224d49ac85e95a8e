#include "driver.h"

#include <cuda_runtime.h>

namespace fastcl::cuda {

int compiled_runtime() { return CUDART_VERSION; }

int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastcl::cuda
