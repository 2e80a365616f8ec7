// The instructions that these files were built for, fastest first.
extern "C" const char* luthier_instructions() {
#if defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#else
  return "avx2";
#endif
}
