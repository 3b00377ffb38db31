// store_task.h - encode and pack the K and V of one token, or decode them, for all KV heads.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace tq {

// Token t of the call into the page slot that slot_mapping gives; a negative slot is skipped.
void run_store_task(const StoreParams& params, int64_t token);

// Token t of the call's range out of its page.
void run_dequant_task(const DequantParams& params, int64_t token);

}  // namespace tq
