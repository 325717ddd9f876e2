// What FAISS's C interface does not tell: how it was compiled, on which BLAS it runs, and how many
// threads both may use. Called by faiss.rs alone.

#include <dlfcn.h>
#include <omp.h>
#include <string>

namespace faiss {
std::string get_compile_options();
}

namespace {
template <typename Function>
Function blas(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}
} // namespace

extern "C" {

// "OPTIMIZE AVX512 " or the like. Stays valid.
const char* thenar_faiss_compile_options() {
    static const std::string options = faiss::get_compile_options();
    return options.c_str();
}

// "OpenBLAS 0.3.21 ... SkylakeX MAX_THREADS=64", or null where the BLAS is another one.
const char* thenar_faiss_blas() {
    auto config = blas<const char* (*)()>("openblas_get_config");
    return config ? config() : nullptr;
}

// The kernels that OpenBLAS chose for this processor, or null where the BLAS is another one.
const char* thenar_faiss_blas_core() {
    auto core = blas<const char* (*)()>("openblas_get_corename");
    return core ? core() : nullptr;
}

void thenar_faiss_threads(int threads) {
    omp_set_num_threads(threads);
    if (auto set = blas<void (*)(int)>("openblas_set_num_threads")) {
        set(threads);
    }
}
}
