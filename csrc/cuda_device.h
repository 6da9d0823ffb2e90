// The Device of a CUDA GPU.
#pragma once

#include <string>

#include "device.h"

namespace pystage {

// The device of this index. It is made at first use, which initialises CUDA, and never destroyed.
Device& cuda_device(int index);

struct CudaBuild {
  int compiled_runtime;       // CUDART_VERSION
  const char* architectures;  // what the kernels were compiled for
};
CudaBuild cuda_build();

}  // namespace pystage
