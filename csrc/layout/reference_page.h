// reference_page.h - pack one token into a page and read it back, one code at a time: the reference for every kernel's
// loads and stores.
#pragma once

#include <cstdint>

#include "codec/format.h"
#include "layout/page_layout.h"

namespace tq {

// Encodes (in T arithmetic) and stores one token of one head. page is the page's first byte, token in [0, block_size).
template <class T>
void reference_store(const Format& format, const PageLayout& layout, uint8_t* page, int kv_head, int token,
                     const float* key, const float* value);

// Decodes one token of one head: key_out[head_dim] (rotated for Lloyd-Max formats), value_out[head_dim_v] (the same);
// either may be null.
template <class T>
void reference_load(const Format& format, const PageLayout& layout, const uint8_t* page, int kv_head, int token,
                    T* key_out, T* value_out);

// The code of dimension d in a packed row of 3, 4, 5 or 8 bits.
int unpack_code(const uint8_t* row, int bits, int head_dim, int d);
// row must be zeroed before the first call for it.
void pack_code(uint8_t* row, int bits, int head_dim, int d, int code);

}  // namespace tq
