// Calls the parser as nvinfer does, with C arrays from ctypes.
#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseCustomHkd(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                                        NvDsInferParseDetectionParams const &,
                                        std::vector<NvDsInferObjectDetectionInfo> &);

// objects: buffer of rows x 6 floats: class, left, top, width, height, confidence. Returns their number, or -1 on failure.
extern "C" int call_parser(float *boxes, float *scores, unsigned rows, unsigned columns, int score_type, int named,
                           unsigned width, unsigned height, float threshold, float *objects) {
    NvDsInferLayerInfo box_layer{}, score_layer{};
    box_layer.dataType = FLOAT;
    box_layer.inferDims = {2, {rows, columns}, rows * columns};
    box_layer.layerName = "boxes";
    box_layer.buffer = boxes;
    score_layer.dataType = static_cast<NvDsInferDataType>(score_type);
    score_layer.inferDims = {1, {rows}, rows};
    score_layer.layerName = named ? "scores" : "output0";
    score_layer.buffer = scores;
    NvDsInferParseDetectionParams params;
    params.numClassesConfigured = 1;
    params.perClassPreclusterThreshold = {threshold};
    std::vector<NvDsInferObjectDetectionInfo> detected;
    // nvinfer passes the layers in the order of the engine, not of the graph.
    if (!NvDsInferParseCustomHkd({score_layer, box_layer}, {width, height, 3}, params, detected)) return -1;
    for (unsigned i = 0; i < detected.size(); ++i) {
        float *row = objects + 6 * i;
        row[0] = static_cast<float>(detected[i].classId), row[1] = detected[i].left, row[2] = detected[i].top;
        row[3] = detected[i].width, row[4] = detected[i].height, row[5] = detected[i].detectionConfidence;
    }
    return static_cast<int>(detected.size());
}
