// A CUDA GPU as the pool sees it.
#pragma once

#include <string>

#include "device.h"

namespace pystage {

// The device of an index in this process; made at first use, never destroyed. Initialises CUDA.
Device& cuda_device(int index);

struct CudaBuild {
  int compiled_runtime;       // CUDART_VERSION
  const char* architectures;  // what the kernels were compiled for
};
CudaBuild cuda_build();

}  // namespace pystage
