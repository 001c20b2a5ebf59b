// Attention by ATen's flash attention (FlashAttention-2), for GPUs for which cuDNN has nothing: slower, and it allocates
// its results besides the arenas.
#pragma once

#include "engine/cuda/attention.h"

namespace uly::engine::cuda {

// `starts_on_device`: where the caller has put the document starts as int32. The log-sum-exp is heads x tokens.
void flash_forward(const AttentionArgs& a, const std::vector<int64_t>& starts, void* starts_on_device, kernels::Stream stream, int device);
void flash_backward(const AttentionArgs& a, const std::vector<int64_t>& starts, void* starts_on_device, kernels::Stream stream, int device);

}  // namespace uly::engine::cuda
