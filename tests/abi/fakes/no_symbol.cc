// no_symbol.cc - a shared library that is no kernel library.
extern "C" __attribute__((visibility("default"))) int tq_something_else() { return 1; }
