// Which CUDA this module carries and which one the machine's driver speaks; neither wakes a device.
#pragma once

namespace fastcl::cuda {

int compiled_runtime();  // 13000 for 13.0
int driver();            // likewise; 0 without a driver

}  // namespace fastcl::cuda
