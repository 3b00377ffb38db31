// no_symbol.cc - a shared library that is no kernel library, or with TQ_FAKE_NOTE one that lacks its symbol.
#ifdef TQ_FAKE_NOTE
#include "build_id.h"
#include "elf/build_note.h"

TQ_BUILD_NOTE(TQ_FAKE_NOTE);
#endif

extern "C" __attribute__((visibility("default"))) int tq_something_else() { return 1; }
