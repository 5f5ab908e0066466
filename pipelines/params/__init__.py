"""Every knob of the pipeline, as strict pydantic models. `params.yaml` is read here and nowhere else."""

from pipelines.params.base import ParamsError, keyed
from pipelines.params.clip import ClipGroupParams, ClipParams, ImageTextParams, TowersParams
from pipelines.params.data import (
    AnnotatedParams,
    CaptionsParams,
    Cc3mParams,
    Cifar10Params,
    Coco2014Params,
    DataParams,
    Dataset,
    DatasetParams,
    ImageFolderParams,
    ImageNetParams,
    MixtureParams,
    ScenesParams,
    Voc2007Params,
    WaterbirdsParams,
)
from pipelines.params.evaluation import ClipEvaluateParams, EvaluateParams, LinearProbeParams, PublishedParams
from pipelines.params.methods import (
    BcosificationParams,
    BcosifyParams,
    DistillationParams,
    DistillParams,
    FrozenParams,
    GuidanceParams,
    GuideParams,
    PretrainParams,
    StudentParams,
)
from pipelines.params.search import AshaParams, SearchDimension, SearchParams
from pipelines.params.training import (
    ModelParams,
    NetworkParams,
    OptimiserParams,
    StorageParams,
    TrainingParams,
)
from pipelines.params.whole import (
    Params,
    TrackingParams,
    check_space,
    leaves,
    load,
    param,
    replaced,
    validate,
)
