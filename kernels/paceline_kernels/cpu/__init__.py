"""Operations in C++ for CPUs: AMX, AVX-512, AVX2 or portable, chosen when they are loaded."""
