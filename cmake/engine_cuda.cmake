# The part that runs on GPUs, libulysses_cuda.so: loaded by ulysses-engine where a GPU is asked for, so that a run on the
# CPU loads nothing of CUDA.
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/engine/cuda/*.cc)
add_library(uly_engine_cuda STATIC ${cuda_sources})
target_link_libraries(uly_engine_cuda PUBLIC uly_engine)
target_precompile_headers(uly_engine_cuda PRIVATE src/engine/pch.h)
# cudnn-frontend's headers compile for minutes and run on the host only: one file, little optimised.
set_source_files_properties(${CMAKE_SOURCE_DIR}/src/engine/cuda/sdpa.cc PROPERTIES SKIP_PRECOMPILE_HEADERS ON
  COMPILE_OPTIONS "-O1;-g0;-isystem${SITE_PACKAGES}/include;-isystem${SITE_PACKAGES}/nvidia/cudnn/include;-isystem${CUDA_HOME_PYPI}/include")
target_link_directories(uly_engine_cuda PUBLIC ${CUDA_HOME_PYPI}/lib ${SITE_PACKAGES}/nvidia/nccl/lib)
target_link_options(uly_engine_cuda PUBLIC -Wl,-rpath,${CUDA_HOME_PYPI}/lib -Wl,-rpath,${SITE_PACKAGES}/nvidia/cudnn/lib -Wl,-rpath,${SITE_PACKAGES}/nvidia/nccl/lib)
target_link_libraries(uly_engine_cuda PUBLIC -Wl,--no-as-needed -l:libnccl.so.2 torch_cuda c10_cuda -l:libcublasLt.so.13 -Wl,--as-needed)

add_library(ulysses_cuda MODULE $<TARGET_OBJECTS:uly_engine_cuda>)
set_target_properties(ulysses_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR} LINKER_LANGUAGE CXX)
target_link_libraries(ulysses_cuda PRIVATE uly_engine_cuda)
